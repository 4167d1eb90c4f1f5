"""What setup.py and the Makefile need to build da_ops. Not installed."""
