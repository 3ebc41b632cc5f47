"""Tasks with verifiable answers, and the client of a server that answers them."""
