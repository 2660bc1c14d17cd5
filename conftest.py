"""Settings that have to be there before torch is imported, here and in the notebooks' kernels."""

import os
import tempfile

# Threads of several processes on few cores wait for each other busily: a 2 s training can take minutes.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["PRUNEUTILS_SIZE"] = "quick"
# Tests leave the pictures of the repository alone.
os.environ.setdefault("PRUNEUTILS_IMAGES", tempfile.mkdtemp(prefix="pruneutils-images-"))
