"""Do once in the warm server what every trial would repeat: imports, and tables that libraries build lazily.

Nothing here may compute with tensors or touch a device (see `warm_server`).
"""

from __future__ import annotations


def warm_up() -> None:
    """Import the training stack and fill the caches that its first use would fill."""
    # Lazy packages import a name's module when the name is first used.
    import datasets
    import peft
    import torch.profiler._cupti_monitor
    import torch.utils.serialization.config
    import transformers.models.llama.modeling_llama
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from trl import SFTTrainer

    import autosft.workers.training.train

    assert all(
        (datasets, peft, torch, transformers, AutoModelForCausalLM, AutoTokenizer, SFTTrainer, autosft)
    )
    # Compiles 900 patterns for all model types at the first model load: 0.3 s a process.
    get_checkpoint_conversion_mapping("llama")
