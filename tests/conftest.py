import os

# Tests run in two processes on two cores: more threads than that only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
