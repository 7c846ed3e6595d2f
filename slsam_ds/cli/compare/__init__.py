"""`slsam compare`: the same training by several methods, from the same start, and a table of what each took."""
