"""One file a job of the paper, each giving its inputs, targets, loss and metrics."""
