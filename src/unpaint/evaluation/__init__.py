"""From pictures to numbers: suite (plan, paint, score), pictures (the store), stats, detectors, metrics, grid."""
