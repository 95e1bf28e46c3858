"""prefloop: the loop from human preferences to a better language model.

Each command is a function here: `prefloop.sft(prefloop.SFTConfig(model=..., ...))`.
Importing prefloop imports no torch.
"""

from prefloop.commands import (
    chat,
    check,
    compare,
    demo,
    dpo,
    fetch_model,
    generate,
    ppo,
    reward,
    run,
    sample,
    sft,
    winrate,
)
from prefloop.config import (
    ChatConfig,
    CheckConfig,
    CompareConfig,
    DemoConfig,
    DPOConfig,
    FetchModelConfig,
    GenerateConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
    SFTConfig,
    UserError,
    WinrateConfig,
)

__all__ = [
    "ChatConfig",
    "CheckConfig",
    "CompareConfig",
    "DPOConfig",
    "DemoConfig",
    "FetchModelConfig",
    "GenerateConfig",
    "PPOConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "SampleConfig",
    "UserError",
    "WinrateConfig",
    "chat",
    "check",
    "compare",
    "demo",
    "dpo",
    "fetch_model",
    "generate",
    "ppo",
    "reward",
    "run",
    "sample",
    "sft",
    "winrate",
]
