// Rectangular tiles of a map, for convolutions.

#pragma once

#include <algorithm>
#include <cstdint>

namespace ovseg {

constexpr int LARGEST_WINDOW = 11;  // whose 121 pixels are the halo of one

// Whether the backward of a convolution over `maps` takes these sizes.
inline bool takes_convolution(int64_t maps, int64_t prompts, int64_t height, int64_t width, int64_t outputs,
                              int64_t size) {
    return size >= 1 && size <= LARGEST_WINDOW && size % 2 == 1 && height >= 1 && width >= 1 &&
           height <= INT32_MAX / width && prompts >= 1 && prompts <= INT32_MAX / 2 && outputs <= INT32_MAX / 2 &&
           maps <= INT32_MAX;
}

struct MapTiles {
    int height, width;  // of a tile
    int across, count;  // tiles of a row of them, of the map

    MapTiles(int map_height, int map_width, int height, int width)
        : height(height), width(width), across((map_width + width - 1) / width),
          count((map_height + height - 1) / height * across) {}

    // Tiles of about the same size whose sides have at most `height` and `width` pixels.
    static MapTiles even(int map_height, int map_width, int height, int width) {
        const auto share = [](int whole, int most) {
            const int parts = (whole + most - 1) / most;
            return (whole + parts - 1) / parts;
        };
        return MapTiles(map_height, map_width, share(map_height, height), share(map_width, width));
    }

    // As few tiles as can be that have at most `halo` pixels together with those which windows of `size` × `size` reach
    // around them. Of equally few the ones with the smallest halo are taken, then the wider ones.
    static MapTiles with_halo(int map_height, int map_width, int size, int halo) {
        MapTiles best(map_height, map_width, 1, 1);
        for (int height = 1; height <= std::min(map_height, halo / size - size + 1); ++height) {
            const int width = std::min(map_width, halo / (height + size - 1) - size + 1);
            const MapTiles tiles(map_height, map_width, height, width);
            const auto reached = [&](const MapTiles &t) { return (t.height + size - 1) * (t.width + size - 1); };
            if (tiles.count < best.count || (tiles.count == best.count && reached(tiles) < reached(best))) best = tiles;
        }
        return best;
    }
};

}  // namespace ovseg
