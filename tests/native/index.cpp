// The index arithmetic of csrc/device for test_index.py, which calls it through ctypes.

#include "device/mma.cuh"
#include "device/windows.h"

namespace {

template <int BYTES>
void offsets(int rows, int *out) {
    for (int row = 0; row < rows; ++row) {
        for (int piece = 0; piece < BYTES / 16; ++piece) *out++ = ovseg::tile_offset<BYTES>(row, piece);
    }
}

}  // namespace

extern "C" {

// places, regions (windows, window²), plain (windows); returns how many windows there are.
int windows(int height, int width, int window, int shift, int *places, int *regions, int *plain) {
    const ovseg::Windows of{height, width, window, shift};
    for (int which = 0; which < of.count(); ++which) {
        for (int token = 0; token < of.tokens(); ++token) {
            *places++ = of.place(which, token);
            *regions++ = of.region(which, token);
        }
        *plain++ = of.plain(which);
    }
    return of.count();
}

int place(int height, int width, int window, int shift, int which, int token) {
    return ovseg::Windows{height, width, window, shift}.place(which, token);
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

// Of each lane: which row and piece it names to ldmatrix for an A and for two B.
void ldmatrix_places(int *a_row, int *a_piece, int *b_row, int *b_piece) {
    for (int lane = 0; lane < 32; ++lane) {
        *a_row++ = ovseg::a_row(lane), *a_piece++ = ovseg::a_piece(lane);
        *b_row++ = ovseg::b_row(lane), *b_piece++ = ovseg::b_piece(lane);
    }
}

// Of each lane and each of its four values.
void results(int *row, int *column) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) *row++ = ovseg::d_row(lane, i), *column++ = ovseg::d_column(lane, i);
    }
}
}
