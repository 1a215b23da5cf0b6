"""Everything that `config.stage` can name, a file each."""
