.venv/bin/python -m pytest -q -p no:cacheprovider tests/kernel/test_hung.py
.venv/bin/python -m pytest -q -p no:cacheprovider -m long tests/kernel/test_ten_minutes.py
