"""What a report is made of; `tgeo_jax.report` writes it."""
