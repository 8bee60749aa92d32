"""Makes models smaller, and measures what that costs: what the commands `jaxserve lite ...` do."""
