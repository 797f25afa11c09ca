"""Records: a metric of a cell over seeds each, what results.json is a list of."""
