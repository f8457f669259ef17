"""What runs: the plan of an encoder, its rows without padding, and the ways to execute it."""
