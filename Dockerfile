# One image for all runs: docker build --build-arg EXTRA=cuda13 --build-arg COMMIT=$(git rev-parse HEAD) -t IMAGE .
# EXTRA: cuda13, tpu, or empty for CPUs. COMMIT goes into every result, since the image has no .git.
FROM python:3.12-slim
WORKDIR /app
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY tgeo_jax tgeo_jax
COPY configs configs
COPY experiments experiments
COPY results/published.json results/
ARG EXTRA=
# What is built for accelerators is not in the constraints, which pin what the tests ran with.
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[gcs,s3${EXTRA:+,$EXTRA}]"
ARG COMMIT=unknown
ENV TGEO_JAX_COMMIT=$COMMIT PYTHONUNBUFFERED=1
# Anybody: the image's files are read only to it, runs go to a bucket or a volume.
RUN useradd --create-home tgeo
USER tgeo
CMD ["python", "-m", "experiments.reproduce"]
