"""What a simulation says to people: numbers as text, plots as SVG, one HTML file that needs nothing else."""
