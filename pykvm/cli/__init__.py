"""The command line, ``pykvm``. Nothing else may import it; click and rich are loaded only here."""
