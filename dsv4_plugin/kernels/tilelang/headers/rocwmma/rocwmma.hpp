// TileLang includes it and takes nothing from it for CDNA.
#pragma once
