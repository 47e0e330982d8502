"""What the paper claims in sections 3 to 6, and how each is measured; shares are fractions."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from scipy.special import entr

from experiments.judge import findings
from experiments.judge.findings import LAST, Finding, Rows, claim, ranked, select, trend, values

BASELINES = ("deepspeed", "mixtral_offload", "promoe", "moe_infinity")
PAPER_SYSTEMS = ("finemoe", *BASELINES)
EXPERT_SYSTEMS = ("finemoe", *BASELINES[1:])  # DeepSpeed loads whole layers
LATENCIES = ("ttft_s", "tpot_s")
DISTANCE = "prefetch_distance"
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
GRANULARITIES = ({"granularity": "fine"}, {"granularity": "coarse"})
TABLE_1 = ("table1", "Table 1")


def against(others: Sequence[str], *shares: float) -> dict[str, float]:
    """Return the paper's number for each of the others, in the order in which it names them."""
    return dict(zip(others, shares, strict=True))


@claim("value", *TABLE_1, {"mixtral": 0.72, "qwen": 0.81, "phi": 0.84}, unit="%", tolerance=0.01)
def table1_inactive_share(rows: Rows, model: str) -> Finding:
    """Of the parameters of {model}, {paper} are inactive for a token."""
    # The tolerance is one unit of the last digit printed.
    return values(select(rows, {"model": model}), "inactive_share")


@claim("value", *TABLE_1, {"mixtral": 67, "qwen": 23, "phi": 70}, unit="GB", tolerance=1)
def table1_inactive_gb(rows: Rows, model: str) -> Finding:
    """The inactive parameters of {model} take {paper}."""
    return values(select(rows, {"model": model}), "inactive_gb")


@claim("value", *TABLE_1, {"mixtral": 12.9, "qwen": 2.7, "phi": 6.6}, tolerance=0.1)
def table1_active(rows: Rows, model: str) -> Finding:
    """{model} activates {paper} billion parameters for a token."""
    return values(select(rows, {"model": model}), "active_b")


@claim("value", *TABLE_1, {"mixtral": 46.7, "qwen": 14.3, "phi": 42}, tolerance=0.1)
def table1_total(rows: Rows, model: str) -> Finding:
    """{model} has {paper} billion parameters."""
    return values(select(rows, {"model": model}), "total_b")


@claim("order", "1b", "Section 1, Figure 1b")
def fig1b_origin(rows: Rows) -> Finding:
    """FineMoE is nearest the origin of latency and memory footprint, no offloading included."""
    # TPOT and footprint, each over the largest of the systems compared.
    return findings.lowest(rows, ["origin"], [*PAPER_SYSTEMS, "resident"])


@claim("order", "3a", "Figure 3a")
def fig3a_structure(rows: Rows) -> Finding:
    """Fine-grained (iteration) heatmaps are structured, coarse-grained (request) ones blurred."""
    # A blurred row has a higher entropy.
    return ranked(row_entropies(rows), "nats", GRANULARITIES, by=["layer"])


def row_entropies(heatmaps: pd.DataFrame) -> pd.DataFrame:
    """Return the entropy over experts of each layer of the heatmaps, in nats."""
    kept = [name for name in heatmaps if name not in ("coarse", "fine", "fine_counts")]
    long = heatmaps.melt(kept, ["coarse", "fine"], "granularity", "share")
    keys = [name for name in long if name not in ("expert", "share")]
    share = long["share"] / long.groupby(keys)["share"].transform("sum")
    return long.assign(nats=entr(share)).groupby(keys)["nats"].sum().reset_index()


@claim("order", "3b", "Figure 3b")
def fig3b_entropy_counts(rows: Rows) -> Finding:
    """Activation counts have a higher entropy by request than by iteration, everywhere."""
    return ranked(select(rows, {"measure": "counts"}), "nats", GRANULARITIES)


@claim("order", "3b", "Figure 3b")
def fig3b_entropy_gate(rows: Rows) -> Finding:
    """Gate probabilities have a higher entropy by request than by iteration, everywhere."""
    return ranked(select(rows, {"measure": "gate"}), "nats", GRANULARITIES)


@claim("trend", "3c", "Figure 3c", "rises")
def fig3c_rises(rows: Rows) -> Finding:
    """Entropy rises as the activations of more iterations are added up."""
    return trend(values(rows, "nats", by=["iterations"]), "iterations", "rises")


@claim("trend", "3c", "Figure 3c", "flat")
def fig3c_plateau(rows: Rows) -> Finding:
    """The entropy plateaus after about 10 iterations."""
    return findings.plateau(values(rows, "nats", by=["iterations"]), "iterations", after=10)


@claim("order", "3c", "Figure 3c")
def fig3c_models(rows: Rows) -> Finding:
    """The accumulated entropy is highest for Qwen1.5-MoE, then Phi-3.5-MoE, then Mixtral-8x7B."""
    rows = select(rows, {"iterations": LAST})
    return ranked(rows, "nats", [{"model": one} for one in ("mixtral", "phi", "qwen")])


@claim("order", "4", "Figure 4")
def fig4_fine(rows: Rows) -> Finding:
    """Fine-grained prediction has a higher hit rate than coarse-grained, at every distance."""
    fine, coarse = GRANULARITIES
    return ranked(rows, "hit_rate", [coarse, fine], by=["distance"])


@claim("trend", "4", "Figure 4", "falls")
def fig4_falls(rows: Rows) -> Finding:
    """The hit rate of fine-grained prediction falls with the prefetch distance."""
    rows = select(rows, {"granularity": "fine"})
    return trend(values(rows, "hit_rate", by=["distance"]), "distance", "falls")


@claim("trend", "8", "Section 4.2, Figure 8", "rises")
def fig8_similarity(rows: Rows) -> Finding:
    """The mean hit rate rises with semantic and with trajectory similarity of two prompts."""
    rows = select(rows, {"method": "pairs"})
    return trend(values(rows, "hit_rate", by=["search", "score"]), "score", "rises")


@claim("at least", "9", "Section 4.2, Figure 9", 0.5, weaker=0)
def fig9_pearson(rows: Rows) -> Finding:
    """Over pairs of prompts, similarity and hit rate correlate strongly, everywhere."""
    # 0.5 is "strong" by Cohen's convention; the paper draws bars, no limit.
    return values(select(rows, {"method": "pairs"}), "pearson", by=["search"])


@claim("value", "9", "Section 4.2, Figure 9", 0.93, tolerance=0.005)
def fig9_mean(rows: Rows) -> Finding:
    """Over pairs of prompts, the mean of the twelve Pearson coefficients is 0.93."""
    rows = select(rows, {"method": "pairs"})
    binned = f"Of the means of figure 8's bins it is {rows['of_bins'].mean():.2f}."
    return replace(values(rows, "pearson", by=["search"]), details=[binned])


@claim("at least", "9", "Section 4.2, Figure 9", 0.5, weaker=0)
def fig9_match(rows: Rows) -> Finding:
    """Beyond pairs: a best match's similarity correlates strongly with its hit rate, everywhere."""
    # Of layers ahead for a trajectory; the paper's pairs compare whole maps, and predict nothing.
    return values(select(rows, {"method": "matches"}), "pearson", by=["search"])


@claim("reduction", "10", "Section 6.2, Figure 10", against(BASELINES, 0.74, 0.67, 0.56, 0.53))
def fig10_ttft(rows: Rows, system: str) -> Finding:
    """FineMoE lowers TTFT by {paper} against {system}."""
    return findings.reductions(rows, ["ttft_s"], ["finemoe", system])


@claim("reduction", "10", "Section 6.2, Figure 10", against(BASELINES, 0.46, 0.38, 0.27, 0.22))
def fig10_tpot(rows: Rows, system: str) -> Finding:
    """FineMoE lowers TPOT by {paper} against {system}."""
    return findings.reductions(rows, ["tpot_s"], ["finemoe", system])


@claim("increase", "10", "Section 6.2, Figure 10", against(BASELINES[1:], 0.14, 0.37, 0.68))
def fig10_hits(rows: Rows, system: str) -> Finding:
    """FineMoE raises the expert hit rate by {paper} against {system}."""
    return findings.increases(rows, "hit_rate", ["finemoe", system])


@claim("order", "11", "Section 6.2, Figure 11")
def fig11_cdf(rows: Rows) -> Finding:
    """Online, FineMoE's CDF of end-to-end latency lies left of every baseline's."""
    # The paper's requests take 40 to 200 s at 2.91 a second: with queueing they would take hours.
    return findings.lowest(rows, [f"service_s@{one}" for one in QUANTILES], PAPER_SYSTEMS)


@claim("order", "11", "Section 6.2, Figure 11")
def fig11_queueing(rows: Rows) -> Finding:
    """The same with the time that a request queues, which "end-to-end" includes elsewhere."""
    return findings.lowest(rows, [f"e2el_s@{one}" for one in QUANTILES], PAPER_SYSTEMS)


@claim("reduction", "12", "Section 6.3, Figure 12", against(BASELINES, 0.36, 0.25, 0.16, 0.29))
def fig12(rows: Rows, system: str) -> Finding:
    """At 6 GB of expert cache FineMoE lowers TPOT by {paper} against {system}."""
    return findings.reductions(select(rows, {"memory_budget": 6}), ["tpot_s"], ["finemoe", system])


@claim("trend", "12", "Section 6.3, Figure 12", "falls")
def fig12_narrows(rows: Rows) -> Finding:
    """The gaps in TPOT narrow as the limit of the expert cache grows."""
    gaps = findings.reductions(rows, ["tpot_s"], PAPER_SYSTEMS, by=["memory_budget_gb"])
    return trend(gaps, "memory_budget_gb", "falls", "reduction of ")


@claim("order", "13", "Section 6.4, Figure 13")
def fig13_first(rows: Rows) -> Finding:
    """On the A100, too, FineMoE has the lowest TTFT and TPOT."""
    return findings.lowest(rows, LATENCIES, PAPER_SYSTEMS)


@claim("order", "13", "Section 6.4, Figure 13", against="10")
def fig13_smaller_gains(rows: Rows, others: Rows) -> Finding:
    """On the A100 FineMoE's reductions are smaller than on the six RTX 3090s."""
    here, there = (findings.reductions(one, LATENCIES, PAPER_SYSTEMS) for one in (rows, others))
    return findings.smaller(here, there)


@claim("at most", "13", "Section 6.4, Figure 13", 0.02, unit="%", against="10")
def fig13_hits_unchanged(rows: Rows, others: Rows) -> Finding:
    """The hit rates on the A100 are those on the six RTX 3090s."""
    # "Unchanged" is read as within two percentage points.
    return findings.changes(rows, others, "hit_rate", EXPERT_SYSTEMS)


SPECULATE = {"system": "in_searcher", "predictor": "speculation"}
HIT_COUNT = {"system": "in_searcher", "predictor": "hit_count"}
T, T_S, T_S_DELTA = (
    {"system": "finemoe", "search": search, "selection": selection, "eviction": "lru"}
    for search, selection in (("trajectory", "top_k"), ("both", "top_k"), ("both", "delta"))
)


@claim("order", "14a", "Section 6.5, Figure 14a")
def fig14a_hit_count_worst(rows: Rows) -> Finding:
    """Of the ways to track patterns, the hit count has the lowest hit rate."""
    # All five in FineMoE's searcher, with LRU caching.
    others = [SPECULATE, T, T_S, T_S_DELTA]
    return findings.lowest(rows, ["hit_rate"], [HIT_COUNT, *others])


@claim("order", "14a", "Section 6.5, Figure 14a")
def fig14a_features_add(rows: Rows) -> Finding:
    """Each feature of the map adds hits, trajectory (T), semantics (S), threshold (delta)."""
    return ranked(rows, "hit_rate", [T, T_S, T_S_DELTA])


@claim("order", "14b", "Section 6.5, Figure 14b")
def fig14b_caching(rows: Rows) -> Finding:
    """LRU has a lower hit rate than LFU, and LFU than FineMoE's caching."""
    caching = [{"system": "finemoe", "eviction": one} for one in ("lru", "lfu", "finemoe")]
    return ranked(rows, "hit_rate", caching)


@claim("value", "15", "Section 6.6, Figure 15", {"mixtral": 3, "qwen": 6, "phi": 4}, weaker=1)
def fig15_ttft(rows: Rows, model: str) -> Finding:
    """For {model} TTFT is lowest at prefetch distance {paper}."""
    of_model = select(rows, {"model": model})
    return findings.best_setting(values(of_model, "ttft_s", "finemoe", [DISTANCE]), DISTANCE)


@claim("value", "15", "Section 6.6, Figure 15", {"mixtral": 3, "qwen": 6, "phi": 4}, weaker=1)
def fig15_tpot(rows: Rows, model: str) -> Finding:
    """For {model} TPOT is lowest at prefetch distance {paper}."""
    of_model = select(rows, {"model": model})
    return findings.best_setting(values(of_model, "tpot_s", "finemoe", [DISTANCE]), DISTANCE)


@claim("trend", "16a", "Section 6.6, Figure 16a", "flat")
def fig16a_plateau(rows: Rows) -> Finding:
    """Semantic and trajectory scores rise steeply up to a capacity of 1,000 maps, then are flat."""
    return findings.plateau(
        values(rows, "score", by=["search", "capacity"]), "capacity", after=1000
    )


@claim("at least", "16b", "Section 6.6, Figure 16b", 0.5, unit="%")
def fig16b_lowest_in_most(rows: Rows) -> Finding:
    """FineMoE has the lowest TTFT and TPOT at most batch sizes."""
    return findings.share_lowest(rows, LATENCIES, EXPERT_SYSTEMS, by=["batch_size"])


@claim("at most", "17", "Section 6.7, Figure 17", 0.05, unit="ms")
def fig17_overhead(rows: Rows) -> Finding:
    """FineMoE's synchronous overhead is below 50 ms an iteration."""
    return values(rows, "sync_s", "finemoe")


@claim("at most", "17", "Section 6.7, Figure 17", 0.01, unit="%")
def fig17_share(rows: Rows) -> Finding:
    """FineMoE's synchronous overhead is at most 1 % of the iteration."""
    return values(rows, "sync_share", "finemoe")


@claim("at most", "18", "Section 6.7, Figure 18", 200, unit="MB")
def fig18_maps(rows: Rows) -> Finding:
    """A store of 32K maps takes less than 200 MB (fp32 maps alone, as the paper counts)."""
    return values(select(rows, {"capacity": LAST}), "maps_mb")


@claim("at most", "18", "Section 6.7, Figure 18", 200, unit="MB")
def fig18_with_embeddings(rows: Rows) -> Finding:
    """A store of 32K maps takes less than 200 MB with the embeddings that semantic search needs."""
    return values(select(rows, {"capacity": LAST}), "total_mb")


# The paper's averages. 47 % is the mean of its four TTFT and four TPOT reductions.


@claim("reduction", "10", "Abstract", 0.47)
def headline_latency(rows: Rows) -> Finding:
    """FineMoE lowers latency by 47 % (mean of TTFT and TPOT over the four baselines)."""
    return findings.reductions(rows, LATENCIES, PAPER_SYSTEMS)


@claim("increase", "10", "Abstract", 0.39)
def headline_hits(rows: Rows) -> Finding:
    """FineMoE raises the expert hit rate by 39 % (mean over three baselines; 36 % in the talk)."""
    return findings.increases(rows, "hit_rate", EXPERT_SYSTEMS)


@claim("reduction", "12", "Talk", 0.32)
def headline_6gb(rows: Rows) -> Finding:
    """At 6 GB of expert cache FineMoE lowers TPOT by 32 % (mean over the four baselines)."""
    return findings.reductions(select(rows, {"memory_budget": 6}), ["tpot_s"], PAPER_SYSTEMS)
