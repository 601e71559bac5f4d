"""Exports trained models in a form that other programs load: `python -m ds_cmli.export RUN DIR`.

An exported model is loaded so:

    import ds_cmli.export  # registers the model; without this import, pass trust_remote_code=True
    from transformers import AutoModel, AutoProcessor
    model, processor = AutoModel.from_pretrained(DIR), AutoProcessor.from_pretrained(DIR)
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from ds_cmli.export.configuration import CMLIConfig
from ds_cmli.export.modeling import CMLIModel, CMLIOutput
from ds_cmli.export.processing import CMLIProcessor

AutoConfig.register(CMLIConfig.model_type, CMLIConfig)
AutoModel.register(CMLIConfig, CMLIModel)
AutoProcessor.register(CMLIConfig, CMLIProcessor)

__all__ = ["CMLIConfig", "CMLIModel", "CMLIOutput", "CMLIProcessor"]
