"""SL-SAM inside the frameworks that people already use, and the command line."""
