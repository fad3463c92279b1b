"""Being here, beside __init__.py, makes ``tests.support`` importable however pytest is started."""
