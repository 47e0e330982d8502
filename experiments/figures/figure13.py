"""Figure 13 of the paper (section 6.4): figure 10 on testbed B, one A100."""

from functools import partial

from experiments.figures import figure10

draw = partial(figure10.draw_overall, ("13", f"{figure10.TITLE} on testbed B"))
