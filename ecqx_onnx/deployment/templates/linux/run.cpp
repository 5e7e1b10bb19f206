// The model of this folder, checked and used from C++ 17 with onnxruntime's public C++ API.
//
//   ./run               the self-check: are the outputs of golden inputs the golden outputs? exit status 1 if not
//   ./run FILE          the prediction for one image (binary .pgm or .ppm of the model's size), or for a file of raw little-endian
//                       values that are ready for the model
//
// It reads golden.txt, which says the same as manifest.json in lines of fields between tabs. The model's checksum is compared before
// the model is loaded; those of the golden files are left to run.py.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __GLIBC__  // which the headers above define
#include <malloc.h>
#endif

namespace {

using Bytes = std::vector<char>;
using Fields = std::vector<std::string>;

struct Type {
  ONNXTensorElementDataType onnx;
  size_t size;
};
const std::map<std::string, Type> kTypes = {
    {"float32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4}}, {"float64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8}},
    {"int64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8}},   {"int32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4}},
    {"int16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, 2}},   {"int8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1}},
    {"uint8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1}},   {"bool", {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1}},
};

struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  Bytes data;

  size_t count() const { return std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<>()); }
};

struct Output {
  std::string name;
  double tolerance;
};

struct Case {
  std::vector<Array> inputs, outputs;
};

struct Stored {
  std::string file, sha256;
};

struct Deployment {
  std::string model;
  std::vector<Stored> files;  // the model, and its data where they lie in other files
  long long bytes = 0, float32_bytes = 0;
  std::vector<std::string> inputs, labels;
  std::vector<Output> outputs;
  std::vector<float> mean, std;
  std::string kind;
  float scale = 1;
  std::vector<int64_t> raw_shape;  // [height, width] or [height, width, channels]; empty where no raw input is known
  std::vector<Case> cases;
};

[[noreturn]] void Fail(const std::string& message) { throw std::runtime_error(message); }

Bytes ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Fail(path + ": cannot be read");
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// SHA-256 of FIPS 180-4, as hexadecimal digits.
class Sha256 {
 public:
  static std::string Of(Bytes data) {
    const uint64_t bits = 8 * static_cast<uint64_t>(data.size());
    data.push_back(static_cast<char>(0x80));
    while (data.size() % 64 != 56) data.push_back(0);
    for (int shift = 56; shift >= 0; shift -= 8) data.push_back(static_cast<char>(bits >> shift & 0xff));
    Sha256 hash;
    for (size_t begin = 0; begin < data.size(); begin += 64) hash.Block(reinterpret_cast<const unsigned char*>(data.data()) + begin);
    std::string digits;
    for (uint32_t word : hash.state_) {
      for (int shift = 28; shift >= 0; shift -= 4) digits.push_back("0123456789abcdef"[word >> shift & 15]);
    }
    return digits;
  }

 private:
  using Words = std::array<uint32_t, 64>;

  // The first 32 bits of the fractional parts of the first primes' cube roots, and of the first eight primes' square roots.
  Sha256() {
    size_t count = 0;
    for (int number = 2; count < 64; ++number) {
      bool prime = true;
      for (int divisor = 2; divisor * divisor <= number; ++divisor) prime = prime && number % divisor != 0;
      if (!prime) continue;
      if (count < 8) state_[count] = Fraction(number, 2);
      constants_[count++] = Fraction(number, 3);
    }
  }

  // floor(2^32 * number^(1 / degree)) mod 2^32, by bisection with whole numbers: root^degree <= number * 2^(32 degree).
  static uint32_t Fraction(uint32_t number, int degree) {
    uint64_t low = 0, high = uint64_t{1} << 37;
    while (high - low > 1) {
      const uint64_t middle = (low + high) / 2;
      (AtMost(middle, degree, number) ? low : high) = middle;
    }
    return static_cast<uint32_t>(low);
  }

  static bool AtMost(uint64_t root, int degree, uint32_t number) {
    std::array<uint64_t, 6> power{1};  // 32 bits each, the lowest first
    for (int k = 0; k < degree; ++k) {
      std::array<uint64_t, 6> next{};
      for (size_t i = 0; i < 4; ++i) {
        next[i] += power[i] * (root & 0xffffffff);
        next[i + 1] += power[i] * (root >> 32);
        next[i + 1] += next[i] >> 32;
        next[i] &= 0xffffffff;
      }
      power = next;
    }
    const size_t place = static_cast<size_t>(degree);
    for (size_t i = 5; i > place; --i) {
      if (power[i] != 0) return false;
    }
    if (power[place] != number) return power[place] < number;
    return std::all_of(power.begin(), power.begin() + degree, [](uint64_t word) { return word == 0; });
  }

  static uint32_t Turn(uint32_t word, int count) { return word >> count | word << (32 - count); }

  void Block(const unsigned char* data) {
    Words w{};
    for (size_t t = 0; t < 16; ++t) {
      for (size_t i = 0; i < 4; ++i) w[t] = w[t] << 8 | data[4 * t + i];
    }
    for (size_t t = 16; t < 64; ++t) {
      const uint32_t a = w[t - 15], b = w[t - 2];
      w[t] = w[t - 16] + (Turn(a, 7) ^ Turn(a, 18) ^ a >> 3) + w[t - 7] + (Turn(b, 17) ^ Turn(b, 19) ^ b >> 10);
    }
    std::array<uint32_t, 8> s = state_;
    for (size_t t = 0; t < 64; ++t) {
      const uint32_t one = s[7] + (Turn(s[4], 6) ^ Turn(s[4], 11) ^ Turn(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + constants_[t] + w[t];
      const uint32_t two = (Turn(s[0], 2) ^ Turn(s[0], 13) ^ Turn(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      s = {one + two, s[0], s[1], s[2], s[3] + one, s[4], s[5], s[6]};
    }
    for (size_t i = 0; i < 8; ++i) state_[i] += s[i];
  }

  std::array<uint32_t, 8> state_{};
  Words constants_{};
};

std::vector<int64_t> ParseShape(const std::string& text) {
  std::vector<int64_t> shape;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, 'x');) shape.push_back(std::stoll(part));
  return shape;
}

Array ReadArray(const Fields& fields) {  // kind, file, dtype, shape
  Array array{fields.at(2), ParseShape(fields.at(3)), ReadFile(fields.at(1))};
  if (!kTypes.count(array.dtype)) Fail(fields[1] + ": has the type " + array.dtype + ", which this program does not know");
  if (array.data.size() != array.count() * kTypes.at(array.dtype).size) Fail(fields[1] + ": does not hold its shape " + fields[3]);
  return array;
}

Deployment ReadDeployment(const std::string& path) {
  std::ifstream file(path);
  if (!file) Fail(path + ": cannot be read; start the program in its folder");
  Deployment d;
  for (std::string line; std::getline(file, line);) {
    Fields fields;
    std::stringstream stream(line);
    for (std::string field; std::getline(stream, field, '\t');) fields.push_back(field);
    if (fields.empty() || fields[0][0] == '#') continue;
    const std::string& key = fields[0];
    if (key == "model") {
      d.model = fields.at(1);
      d.bytes = std::stoll(fields.at(2));
      d.float32_bytes = std::stoll(fields.at(3));
      d.files.push_back({d.model, fields.at(4)});
    } else if (key == "external") {
      d.files.push_back({fields.at(1), fields.at(2)});
    } else if (key == "input") {
      d.inputs.push_back(fields.at(1));
    } else if (key == "output") {
      d.outputs.push_back({fields.at(1), std::stod(fields.at(2))});
    } else if (key == "label") {
      d.labels.push_back(fields.size() > 1 ? fields[1] : "");
    } else if (key == "kind") {
      d.kind = fields.at(1);
    } else if (key == "scale") {
      d.scale = std::stof(fields.at(1));
    } else if (key == "mean" || key == "std") {
      auto& values = key == "mean" ? d.mean : d.std;
      for (size_t i = 1; i < fields.size(); ++i) values.push_back(std::stof(fields[i]));
    } else if (key == "raw") {
      d.raw_shape = ParseShape(fields.at(1));
    } else if (key == "case") {
      d.cases.emplace_back();
    } else if (key == "golden_input") {
      d.cases.at(d.cases.size() - 1).inputs.push_back(ReadArray(fields));
    } else if (key == "golden_output") {
      d.cases.at(d.cases.size() - 1).outputs.push_back(ReadArray(fields));
    }
  }
  return d;
}

class Model {
 public:
  explicit Model(const Deployment& deployment) : deployment_(deployment), environment_(ORT_LOGGING_LEVEL_ERROR, "run") {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    session_ = Ort::Session(environment_, deployment.model.c_str(), options);
#ifdef __GLIBC__
    malloc_trim(0);  // what loading has left free in the heap
#endif
    for (const auto& name : deployment_.inputs) input_names_.push_back(name.c_str());
    for (const auto& output : deployment_.outputs) output_names_.push_back(output.name.c_str());
  }

  std::vector<Ort::Value> Run(std::vector<Array>& inputs) {
    std::vector<Ort::Value> values;
    for (auto& input : inputs) {
      values.push_back(Ort::Value::CreateTensor(memory_, input.data.data(), input.data.size(), input.shape.data(), input.shape.size(),
                                                kTypes.at(input.dtype).onnx));
    }
    return session_.Run(Ort::RunOptions{nullptr}, input_names_.data(), values.data(), values.size(), output_names_.data(),
                        output_names_.size());
  }

 private:
  const Deployment& deployment_;
  Ort::Env environment_;
  Ort::Session session_{nullptr};
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<const char*> input_names_, output_names_;
};

template <typename T>
std::vector<double> Widened(const void* data, size_t count) {
  const T* values = static_cast<const T*>(data);
  return std::vector<double>(values, values + count);
}

std::vector<double> Widened(const std::string& dtype, const void* data, size_t count) {
  if (dtype == "float32") return Widened<float>(data, count);
  if (dtype == "float64") return Widened<double>(data, count);
  if (dtype == "int64") return Widened<int64_t>(data, count);
  if (dtype == "int32") return Widened<int32_t>(data, count);
  if (dtype == "int16") return Widened<int16_t>(data, count);
  if (dtype == "int8") return Widened<int8_t>(data, count);
  return Widened<uint8_t>(data, count);
}

// max |a - b|; infinite for other shapes or types, and for what is no number.
double Difference(const Ort::Value& found, const Array& wanted) {
  const auto info = found.GetTensorTypeAndShapeInfo();
  if (info.GetShape() != wanted.shape || info.GetElementType() != kTypes.at(wanted.dtype).onnx) return INFINITY;
  const auto a = Widened(wanted.dtype, found.GetTensorRawData(), wanted.count());
  const auto b = Widened(wanted.dtype, wanted.data.data(), wanted.count());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double delta = std::abs(a[i] - b[i]);
    worst = std::isnan(delta) ? INFINITY : std::max(worst, delta);
  }
  return worst;
}

double MedianLatency(Model& model, std::vector<Array>& inputs) {  // milliseconds
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  for (int i = 0; i < 55; ++i) {
    const auto start = Clock::now();
    model.Run(inputs);
    if (i >= 5) times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

int SelfCheck(Deployment& d, Model& model, double load_milliseconds) {
  std::vector<double> worst(d.outputs.size(), 0);
  for (auto& one : d.cases) {
    const auto outputs = model.Run(one.inputs);
    for (size_t i = 0; i < outputs.size(); ++i) worst[i] = std::max(worst[i], Difference(outputs[i], one.outputs.at(i)));
  }
  bool passed = static_cast<long long>(ReadFile(d.model).size()) == d.bytes;
  if (!passed) std::printf("FAILED  file: %s has another size than when it was deployed\n", d.model.c_str());
  for (size_t i = 0; i < worst.size(); ++i) {
    const bool ok = worst[i] <= d.outputs[i].tolerance;
    passed &= ok;
    std::printf("%s  %s: largest difference %.1e, allowed %.1e\n", ok ? "ok    " : "FAILED", d.outputs[i].name.c_str(), worst[i],
                d.outputs[i].tolerance);
  }
  std::printf("size      %lld bytes", d.bytes);
  if (d.float32_bytes > d.bytes) std::printf(", %.1fx smaller than float32 (%lld)", double(d.float32_bytes) / d.bytes, d.float32_bytes);
  std::printf("\nload      %.1f ms\n", load_milliseconds);
  if (!d.cases.empty()) std::printf("latency   %.3f ms, one thread\n", MedianLatency(model, d.cases[0].inputs));
  std::printf("%s\n", passed ? "PASSED" : "FAILED: this machine does not compute what was computed when the folder was made");
  return passed ? 0 : 1;
}

// Binary PGM (P5) or PPM (P6) of 8 bit -> the model's input [1, channels, height, width]: x = raw / scale; x = (x - mean) / std
Array ReadPicture(const std::string& path, const Deployment& d) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, most = 0;
  file >> magic >> width >> height >> most;
  file.get();
  const int64_t channels = magic == "P6" ? 3 : 1;
  const int64_t wanted = d.raw_shape.size() == 3 ? d.raw_shape[2] : 1;
  if (!file || most != 255 || (magic != "P5" && magic != "P6")) Fail(path + ": is no binary .pgm or .ppm of 8 bit");
  if (height != d.raw_shape.at(0) || width != d.raw_shape.at(1) || channels != wanted) {
    Fail(path + ": the model takes " + std::to_string(d.raw_shape[1]) + " x " + std::to_string(d.raw_shape[0]) +
         (wanted == 3 ? " colour" : " grey") + " pixels");
  }
  std::vector<uint8_t> pixels(static_cast<size_t>(height * width * channels));
  if (!file.read(reinterpret_cast<char*>(pixels.data()), static_cast<std::streamsize>(pixels.size()))) Fail(path + ": is cut short");
  std::vector<float> x(pixels.size());
  const size_t plane = static_cast<size_t>(height * width);
  for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
    for (size_t i = 0; i < plane; ++i) {
      float value = static_cast<float>(pixels[i * channels + c]);
      if (d.scale > 1 && d.scale < 255) value = std::round(value * d.scale / 255);  // as the data set's levels
      value /= d.scale;
      if (!d.mean.empty()) value -= d.mean[d.mean.size() == 1 ? 0 : c];
      if (!d.std.empty()) value /= d.std[d.std.size() == 1 ? 0 : c];
      x[c * plane + i] = value;
    }
  }
  Array array{"float32", {1, channels, height, width}, Bytes(x.size() * sizeof(float))};
  std::memcpy(array.data.data(), x.data(), array.data.size());
  return array;
}

int Predict(const Deployment& d, Model& model, const std::string& path) {
  const bool picture = path.size() > 4 && (path.substr(path.size() - 4) == ".pgm" || path.substr(path.size() - 4) == ".ppm");
  if (picture && (d.kind != "image" || d.raw_shape.empty())) Fail(path + ": this model takes no images");
  std::vector<Array> inputs;
  if (picture) {
    inputs.push_back(ReadPicture(path, d));
  } else {
    Array like = d.cases.at(0).inputs.at(0);
    const Bytes data = ReadFile(path);
    if (data.size() != like.data.size()) Fail(path + ": holds " + std::to_string(data.size()) + " bytes, the input has " + std::to_string(like.data.size()));
    like.data = data;
    inputs.push_back(like);
  }
  const auto outputs = model.Run(inputs);
  const auto info = outputs.at(0).GetTensorTypeAndShapeInfo();
  if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) Fail("the first output is not float32: nothing to rank");
  const size_t classes = static_cast<size_t>(info.GetShape().back());
  const float* scores = static_cast<const float*>(outputs[0].GetTensorRawData());
  const float highest = *std::max_element(scores, scores + classes);
  double sum = 0;
  for (size_t i = 0; i < classes; ++i) sum += std::exp(scores[i] - highest);
  std::vector<size_t> order(classes);
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  for (size_t i = 0; i < std::min<size_t>(5, classes); ++i) {
    const size_t k = order[i];
    const std::string label = k < d.labels.size() ? d.labels[k] : "class " + std::to_string(k);
    std::printf("%6.2f %%  %s\n", 100 * std::exp(scores[k] - highest) / sum, label.c_str());
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    Deployment deployment = ReadDeployment("golden.txt");
    for (const auto& [file, sha256] : deployment.files) {  // a runtime may load damaged weights without a word
      if (Sha256::Of(ReadFile(file)) != sha256) Fail(file + " was changed: its sha256 is not golden.txt's; deploy it again");
    }
    const auto start = std::chrono::steady_clock::now();
    Model model(deployment);
    const double load = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    return count > 1 ? Predict(deployment, model, arguments[1]) : SelfCheck(deployment, model, load);
  } catch (const std::exception& error) {
    std::cerr << "FAILED: " << error.what() << "\n";
    return 1;
  }
}
