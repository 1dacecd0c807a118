"""Whatever is planned here, what `resolve` prints of it is a map that leads to the same plan."""

from laws.map_law import map_law as map_law
