"""Does it learn? Methods x tasks x seeds, one line of JSON per run, and the tables that settings are chosen by."""
