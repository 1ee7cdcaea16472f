"""`python -m bench.gpu`: what a machine's GPU makes of the tests, training steps and sampling, in under ten minutes."""
