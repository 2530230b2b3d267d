"""`[model]`: the model, and how prompts become its input."""

from pydantic import Field

from speed_async.config.sections.section import PositiveInt, Section


class ModelConfig(Section):
    path: str
    """Hugging Face folder (config, safetensors, tokenizer), or the id of a model of the hub, such
    as `Qwen/Qwen2.5-Math-1.5B`. A folder of that name has precedence."""
    context_length: PositiveInt | None = None
    """Prompt plus completion tokens; None uses the limit of the model."""
    chat_template: bool = False
    """Wrap each prompt as one user message in the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message before the prompt (with `chat_template`); None: no message, so a template may
    add its own."""
    template_arguments: dict[str, object] = Field(default_factory=dict)
    """Variables for the chat template, such as `enable_thinking = false`."""
    stop_tokens: list[str] = Field(default_factory=list)
    """Texts of further tokens that end a completion, such as `["<|im_end|>"]`, besides the EOS
    tokens of the model folder. Each must be one token of the model: stop strings of several tokens
    are not supported."""
