"""Settings that have to be there before torch is imported, here and in the notebooks' kernels."""

import os

# Idle threads spin while they wait: with several processes on few cores, a training of 2 s can take minutes.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["PRUNEUTILS_SIZE"] = "quick"
# Folders that the user has chosen for pictures and records are not for tests; pictures then go to build/.
for variable in ("PRUNEUTILS_IMAGES", "PRUNEUTILS_RESULTS"):
    os.environ.pop(variable, None)
