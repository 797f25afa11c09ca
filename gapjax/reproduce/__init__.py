"""Suites of cells: what to train, the records, the loop over cells and seeds."""
