"""Operations with several implementations: each folder holds one op, its definition in `api.py`."""
