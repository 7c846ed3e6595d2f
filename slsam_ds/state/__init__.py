"""What of SL-SAM outlives a process."""
