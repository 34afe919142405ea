"""RQ-VAE for Tersor."""

from tersor import hookimpl
from tersor_rq_vae.rq_transformer import RQTransformer
from tersor_rq_vae.rq_vae import RQVAE, RQLayer

__all__ = ["RQVAE", "RQLayer", "RQTransformer"]


@hookimpl
def tersor_quantizer() -> type[RQVAE]:
    return RQVAE
