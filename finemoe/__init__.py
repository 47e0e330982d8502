"""FineMoE: fine-grained expert offloading (EuroSys '26) and the engine it runs on."""
