"""Where a step climbs."""
