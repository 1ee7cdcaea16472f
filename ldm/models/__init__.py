"""Networks: U-Net, autoencoder and text towers. They know neither schedules nor training."""
