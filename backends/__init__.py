"""How one machine does the operations: see `base.py` for the contract."""
