"""The server: routes, and what stands between them and the engine."""
