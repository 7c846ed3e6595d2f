"""What a run did, in pictures and tables: `python -m slsam_ds.report OUTPUT_DIR`. Needs no ranks and no framework."""
