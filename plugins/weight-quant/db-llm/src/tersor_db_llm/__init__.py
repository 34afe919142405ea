"""DB-LLM for Tersor."""

from tersor import hookimpl
from tersor_db_llm.db_llm import DBLLM

__all__ = ["DBLLM"]


@hookimpl
def tersor_quantizer() -> type[DBLLM]:
    return DBLLM
