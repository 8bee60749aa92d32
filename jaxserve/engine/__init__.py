"""The host side of serving: what a request is, what the next step computes, and the loop that runs it."""
