"""What training will cost, before it is paid for."""
