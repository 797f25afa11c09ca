"""Names and files of other projects' weights."""
