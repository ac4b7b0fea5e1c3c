"""Networks: named stages of units, as an ANN teacher and as a spiking student."""
