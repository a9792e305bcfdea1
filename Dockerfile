# One image for every process of the cluster: `docker run ralmq broker ...`, `docker run ralmq worker ...`.
# The default torch wheel brings CUDA; PIP_EXTRA_INDEX_URL may name an index of CPU wheels, PIP_FIND_LINKS a folder in
# the base image that holds one.
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

WORKDIR /ralmq
COPY constraints.txt ./
RUN pip install -c constraints.txt torch
COPY . .
RUN pip install -c constraints.txt . \
 && useradd --create-home ralmq \
 && mkdir /indexes /documents /keys /worker-keys \
 && python -c "from pathlib import Path; from ralmq.demo.corpus import numpy_documents; \
[Path(f'/documents/{document.name}.txt').write_text(document.text) for document in numpy_documents()]" \
 && chown ralmq /indexes /keys /worker-keys && chmod 700 /keys /worker-keys

USER ralmq
WORKDIR /home/ralmq
ENTRYPOINT ["ralmq"]
CMD ["--help"]
