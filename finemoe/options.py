"""How options are declared: pydantic checks types, ranges and finiteness where they are taken.

`CHECKED` goes with pydantic's `dataclass` and `validate_call`; what they refuse is a ValueError.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictStr, create_model

CHECKED = ConfigDict(allow_inf_nan=False, extra="forbid")

Flag = StrictBool
Text = StrictStr
Count = Annotated[int, Field(strict=True, ge=1, le=2**31)]
Whole = Annotated[int, Field(strict=True, ge=0, le=2**31)]
Bytes = Annotated[int, Field(strict=True, ge=0, le=2**50)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[Number, Field(gt=0, le=1)]
Rate = Annotated[Number, Field(ge=1e-6, le=1e9)]
"""GB/s, TFLOP/s, GB: far below the least and above the most that any hardware has."""
Micros = Annotated[Number, Field(ge=0, le=1e9)]  # microseconds, at most a quarter of an hour


def schema(extra: Literal["ignore", "allow", "forbid"] = "ignore", /, **fields: Any) -> Any:
    """Return a model with a type for each field, or a pair of type and default."""
    config = ConfigDict(
        allow_inf_nan=False, extra=extra, arbitrary_types_allowed=True, protected_namespaces=()
    )
    types: dict[str, Any] = {
        key: kind if isinstance(kind, tuple) else (kind, ...) for key, kind in fields.items()
    }
    return create_model("Options", __config__=config, **types)
