"""Making memsave's tuners known to PEFT: two members of `PeftType`, and `register_peft_method`.

PEFT has no public way to add a method from outside (peft#2273). The members are the one thing that memsave adds to
another package, and only when one of its adapter configs is first used, or by `import memsave.peft`.
"""

from __future__ import annotations

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


def peft_type(name: str) -> PeftType:
    """The member of `PeftType` called `name`, made if absent; it survives copies, pickles and JSON as its name."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Register a tuner under `name`, such as "memsave_shira": the prefix of its parameters' names is `name` + "_"."""
    peft_type(name.upper())
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=f"{name}_")
