"""Selection methods behind one signature: ``rank(pool, method=...)``."""
