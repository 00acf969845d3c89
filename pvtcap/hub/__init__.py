"""What ``export --to hf`` puts into its folder: code that stands alone there, without pvtcap."""
