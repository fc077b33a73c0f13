// The index arithmetic of csrc/device for test_index.py, which calls it through ctypes.

#include "device/mma.cuh"
#include "device/windows.h"

namespace {

template <int BYTES>
void offsets(int rows, int *out) {
    for (int row = 0; row < rows; ++row) {
        for (int vec = 0; vec < BYTES / 16; ++vec) *out++ = ovseg::tile_offset<BYTES>(row, vec);
    }
}

}  // namespace

extern "C" {

// places, regions (windows, window²), plain (windows); returns how many windows there are.
int windows(int height, int width, int window, int shift, int *places, int *regions, int *plain) {
    const ovseg::Windows of{height, width, window, shift};
    for (int which = 0; which < of.count(); ++which) {
        for (int token = 0; token < of.tokens(); ++token) {
            *places++ = of.position(which, token);
            *regions++ = of.region(which, token);
        }
        *plain++ = of.plain(which);
    }
    return of.count();
}

int place(int height, int width, int window, int shift, int which, int token) {
    return ovseg::Windows{height, width, window, shift}.position(which, token);
}

// (rows, bytes / 16)
int tile_offsets(int bytes, int rows, int *out) {
    switch (bytes) {
        case 32: offsets<32>(rows, out); return 0;
        case 64: offsets<64>(rows, out); return 0;
        case 128: offsets<128>(rows, out); return 0;
        case 256: offsets<256>(rows, out); return 0;
        case 512: offsets<512>(rows, out); return 0;
        case 1024: offsets<1024>(rows, out); return 0;
        default: return 1;
    }
}

// Of each lane: which row and vector it names to ldmatrix for a frag_a and for a frag_b2.
void ldmatrix_places(int *a_row, int *a_vec, int *b_row, int *b_vec) {
    for (int lane = 0; lane < 32; ++lane) {
        *a_row++ = ovseg::a_row(lane), *a_vec++ = ovseg::a_vec(lane);
        *b_row++ = ovseg::b_row(lane), *b_vec++ = ovseg::b_vec(lane);
    }
}

// Of each lane and each of its four values.
void results(int *row, int *column) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) *row++ = ovseg::acc_row(lane, i), *column++ = ovseg::acc_col(lane, i);
    }
}
}
