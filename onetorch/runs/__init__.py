"""What a run is: config, folder, metrics, checkpoint, speed plan, report. Knows no algorithm; importing it does not import torch."""
