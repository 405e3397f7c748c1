"""What may stand in front of a backend, and looks like one: a layer each, made by name in `server/chain.py`."""
