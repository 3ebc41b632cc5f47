"""Tasks whose answers can be verified, and the client of a server that solves them."""
